from drivebay.reactor.turn_engine import TurnEngine

class Turns(TurnEngine):
    """One reactor's, for all stores."""
