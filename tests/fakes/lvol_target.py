"""A target that knows pools and disks, as SPDK would answer: for the command line's own tests.

Context: tests. State is a few dictionaries behind a real socket, served by one thread; every
call that changes something is kept in ``calls``. What it does to data it does not do: the end
to end tests of a real target show that. Never imports drivebay.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
CLUSTER = 4 * MIB


class Refusal(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Volume:
    name: str
    store: str
    clusters: int
    thin: bool = True
    snapshot: bool = False
    parent: str | None = None
    external: str | None = None  # the bdev below that it begins with
    allocated: int = 0
    data: dict[int, int] = field(default_factory=dict)  # a cluster's number: the byte that fills it
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass
class Base:
    """A bdev that is no volume."""

    name: str
    size: int
    specific: dict[str, Any]
    product: str = "AIO disk"
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))


class LvolTarget:
    """Serves ``path`` until closed. Sockets of controllers lie beside it."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.bases: dict[str, Base] = {}
        self.stores: dict[str, tuple[str, str, int]] = {}  # name: uuid, base, clusters
        self.volumes: dict[tuple[str, str], Volume] = {}
        self.controllers: list[dict[str, Any]] = []
        self.limits: dict[str, dict[str, int]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.lone: set[str] = set()  # snapshots that a restart lets forget what they are
        self.copy_states: list[dict[str, Any]] = []
        self.failing: set[str] = set()
        self.failing_after: dict[str, int] = {}  # so many calls of a method succeed before
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def names(self) -> list[str]:
        """Methods that changed something, in order."""
        return [method for method, _ in self.calls]

    def show(self, ctrlr: str, bdev: str, sessions: int = 0, cpumask: str | None = None) -> None:
        """A controller that shows a bdev, with so many machines connected."""
        self.controllers.append(
            {
                "ctrlr": ctrlr,
                "socket": str(self.folder / ctrlr),
                "cpumask": cpumask or "0x3",
                "sessions": [{"vid": number} for number in range(sessions)],
                "backend_specific": {"block": {"bdev": bdev}},
            }
        )
        (self.folder / ctrlr).touch()

    # ---- the socket -------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            buffer = b""
            while piece := stream.read1(65536):
                buffer += piece
                try:
                    request = json.loads(buffer)
                except ValueError:
                    continue
                buffer = b""
                connection.sendall(json.dumps(self._answer(request)).encode() + b"\n")

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        method, params = request["method"], request.get("params", {})
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": request["id"]}
        try:
            left = self.failing_after.get(method)
            if method in self.failing or left == 0:
                raise Refusal(-5, "Input/output error")
            if left is not None:
                self.failing_after[method] = left - 1
            result = getattr(self, method)(**params)
        except Refusal as refusal:
            return {**answer, "error": {"code": refusal.code, "message": str(refusal)}}
        if "_get_" not in method and method != "bdev_wait_for_examine":
            self.calls.append((method, params))
        return {**answer, "result": result}

    # ---- what SPDK has ----------------------------------------------------------------------

    def vhost_get_controllers(self) -> list[dict[str, Any]]:
        return self.controllers

    def vhost_create_blk_controller(
        self,
        ctrlr: str,
        dev_name: str,
        serial: str | None = None,
        socket_uid: int | None = None,
        cpumask: str | None = None,
    ) -> bool:
        if any(entry["ctrlr"] == ctrlr for entry in self.controllers):
            raise Refusal(-17, "File exists")
        self.bdev_get_bdevs(dev_name)
        self.show(ctrlr, dev_name, cpumask=cpumask)
        if socket_uid is not None:
            os.chown(self.folder / ctrlr, socket_uid, -1)
        return True

    def vhost_delete_controller(self, ctrlr: str, force: bool = False) -> bool:
        (found,) = [entry for entry in self.controllers if entry["ctrlr"] == ctrlr]
        if found["sessions"] and not force:
            raise Refusal(-16, "Device or resource busy")
        self.controllers.remove(found)
        (self.folder / ctrlr).unlink()
        return True

    def framework_get_reactors(self) -> dict[str, Any]:
        return {"reactors": [{"lcore": 0}]}

    def bdev_wait_for_examine(self) -> bool:
        return True

    def bdev_aio_create(
        self,
        name: str,
        filename: str,
        block_size: int = 512,
        readonly: bool = False,
        uuid: str | None = None,
    ) -> str:
        if name in self.bases:
            raise Refusal(-17, "File exists")
        size = Path(filename).stat().st_size
        self.bases[name] = Base(name, size, {"aio": {"filename": filename, "readonly": readonly}})
        if uuid is not None:
            self.bases[name].uuid = uuid
        return name

    def bdev_aio_delete(self, name: str) -> bool:
        if name not in self.bases:
            raise Refusal(-19, "No such device")
        del self.bases[name]
        for store in [store for store, (_, base, _) in self.stores.items() if base == name]:
            self.bdev_lvol_delete_lvstore(store)  # it closes; what is in the file is not seen here
        return True

    def bdev_aio_rescan(self, name: str) -> bool:
        base = self.bases[name]
        base.size = Path(base.specific["aio"]["filename"]).stat().st_size
        return True

    def bdev_split_create(
        self, base_bdev: str, split_count: int, split_size_mb: int = 0
    ) -> list[str]:
        size = split_size_mb * MIB or self.bases[base_bdev].size // split_count
        names = [f"{base_bdev}p{number}" for number in range(split_count)]
        for name in names:
            specific = {"split": {"base_bdev": base_bdev}}
            self.bases[name] = Base(name, size, specific, "Split Disk")
        return names

    def bdev_split_delete(self, base_bdev: str) -> bool:
        self.bases = {
            name: base
            for name, base in self.bases.items()
            if base.specific.get("split", {}).get("base_bdev") != base_bdev
        }
        return True

    def bdev_lvol_create_lvstore(self, bdev_name: str, lvs_name: str) -> str:
        identity = str(uuid.uuid4())
        clusters = self.bases[bdev_name].size // CLUSTER - 1
        self.stores[lvs_name] = (identity, bdev_name, clusters)
        return identity

    def bdev_lvol_delete_lvstore(self, lvs_name: str) -> bool:
        del self.stores[lvs_name]
        self.volumes = {key: one for key, one in self.volumes.items() if key[0] != lvs_name}
        return True

    def bdev_lvol_grow_lvstore(self, lvs_name: str) -> bool:
        identity, base, _ = self.stores[lvs_name]
        self.stores[lvs_name] = (identity, base, self.bases[base].size // CLUSTER - 1)
        return True

    def bdev_lvol_get_lvstores(self) -> list[dict[str, Any]]:
        return [
            {
                "uuid": identity,
                "name": name,
                "base_bdev": base,
                "total_data_clusters": clusters,
                "free_clusters": clusters - self._allocated(name),
                "block_size": 512,
                "cluster_size": CLUSTER,
                "max_growable_size": 1 << 40,
            }
            for name, (identity, base, clusters) in self.stores.items()
        ]

    def _allocated(self, store: str) -> int:
        return sum(one.allocated for one in self.volumes.values() if one.store == store)

    def bdev_lvol_create(
        self, lvol_name: str, size_in_mib: int, lvs_name: str, thin_provision: bool = False
    ) -> str:
        self._check_free(lvs_name, lvol_name)
        clusters = -(-size_in_mib * MIB // CLUSTER)
        allocated = 0 if thin_provision else clusters
        volume = Volume(lvol_name, lvs_name, clusters, thin_provision, allocated=allocated)
        self.volumes[lvs_name, lvol_name] = volume
        return volume.uuid

    def _volume(self, name: str) -> Volume:
        store, _, lvol = name.partition("/")
        if (store, lvol) not in self.volumes:
            raise Refusal(-19, "No such device")
        return self.volumes[store, lvol]

    def bdev_lvol_delete(self, name: str) -> bool:
        volume = self._volume(name)
        children = [
            one
            for one in self.volumes.values()
            if (one.store, one.parent) == (volume.store, volume.name)
        ]
        if len(children) > 1:
            raise Refusal(-1, "Operation not permitted")
        for child in children:
            child.parent, child.external = volume.parent, volume.external
            child.allocated += volume.allocated
            child.data = volume.data | child.data
        del self.volumes[volume.store, volume.name]
        return True

    def bdev_lvol_resize(self, name: str, size_in_mib: int) -> bool:
        volume = self._volume(name)
        volume.clusters = -(-size_in_mib * MIB // CLUSTER)
        volume.allocated = min(volume.allocated, volume.clusters)
        return True

    def bdev_lvol_snapshot(self, lvol_name: str, snapshot_name: str) -> str:
        volume = self._volume(lvol_name)
        self._check_free(volume.store, snapshot_name)
        made = Volume(
            snapshot_name,
            volume.store,
            volume.clusters,
            True,
            True,
            volume.parent,
            volume.external,
            volume.allocated,
            volume.data,
        )
        volume.data = {}
        volume.parent, volume.allocated, volume.thin = snapshot_name, 0, True
        volume.external = None
        self.volumes[volume.store, snapshot_name] = made
        return made.uuid

    def bdev_lvol_clone(self, snapshot_name: str, clone_name: str) -> str:
        snapshot = self._volume(snapshot_name)
        self._check_free(snapshot.store, clone_name)
        made = Volume(clone_name, snapshot.store, snapshot.clusters, parent=snapshot.name)
        self.volumes[snapshot.store, clone_name] = made
        return made.uuid

    def bdev_lvol_clone_bdev(self, bdev: str, lvs_name: str, clone_name: str) -> str:
        (below,) = [base for base in self.bases.values() if bdev in (base.name, base.uuid)]
        self._check_free(lvs_name, clone_name)
        made = Volume(clone_name, lvs_name, below.size // CLUSTER, external=below.uuid)
        self.volumes[lvs_name, clone_name] = made
        return made.uuid

    def _check_free(self, store: str, name: str) -> None:
        if len(name.encode()) > 63:
            raise Refusal(-22, "Invalid argument")
        if (store, name) in self.volumes:
            raise Refusal(-17, "File exists")

    def bdev_lvol_set_parent(self, lvol_name: str, parent_name: str) -> bool:
        volume, parent = self._volume(lvol_name), self._volume(parent_name)
        if volume.clusters != parent.clusters or volume.parent == parent.name:
            raise Refusal(-32602, "Invalid argument")
        volume.parent = parent.name
        return True

    def bdev_lvol_decouple_parent(self, name: str) -> bool:
        volume = self._volume(name)
        if volume.parent is None:
            raise Refusal(-22, "Invalid argument")
        below = self.volumes[volume.store, volume.parent]
        volume.allocated = max(volume.allocated, below.allocated)
        volume.parent, volume.external = below.parent, below.external
        return True

    def bdev_lvol_start_shallow_copy(
        self, src_lvol_name: str, dst_bdev_name: str
    ) -> dict[str, int]:
        """It is done at once, as far as `copy_states` shows it."""
        volume, into = self._volume(src_lvol_name), self.bases[dst_bdev_name]
        if not volume.snapshot or into.size < volume.clusters * CLUSTER:
            raise Refusal(-22, "Invalid argument")
        with Path(into.specific["aio"]["filename"]).open("r+b") as file:
            for number, byte in volume.data.items():
                file.seek(number * CLUSTER)
                file.write(bytes([byte]) * CLUSTER)
        return {"operation_id": 1}

    def bdev_lvol_check_shallow_copy(self, operation_id: int) -> dict[str, Any]:
        return self.copy_states.pop(0) if self.copy_states else {"state": "complete"}

    def bdev_set_qos_limit(self, name: str, **limits: int) -> bool:
        self.limits.setdefault(name, {}).update(limits)
        return True

    def bdev_get_bdevs(self, name: str | None = None) -> list[dict[str, Any]]:
        shown = [self._show_base(base) for base in self.bases.values()]
        shown += [self._show_volume(volume) for volume in self.volumes.values()]
        if name is not None:
            shown = [one for one in shown if name in (one["name"], *one["aliases"])]
            if not shown:
                raise Refusal(-19, "No such device")
        return shown

    def _show_base(self, base: Base) -> dict[str, Any]:
        bases = {store[1] for store in self.stores.values()}
        bases |= {one.specific.get("split", {}).get("base_bdev") for one in self.bases.values()}
        return {
            "name": base.name,
            "aliases": [base.uuid],
            "product_name": base.product,
            "block_size": 512,
            "num_blocks": base.size // 512,
            "uuid": base.uuid,
            "assigned_rate_limits": self.limits.get(base.name, {}),
            "claimed": base.name in bases,
            "driver_specific": base.specific,
        }

    def _show_volume(self, volume: Volume) -> dict[str, Any]:
        identity, base, _ = self.stores[volume.store]
        alias = f"{volume.store}/{volume.name}"
        lvol: dict[str, Any] = {
            "lvol_store_uuid": identity,
            "base_bdev": base,
            "thin_provision": volume.thin,
            "num_allocated_clusters": volume.allocated,
            "snapshot": volume.snapshot and volume.name not in self.lone,
            "clone": volume.parent is not None,
            "esnap_clone": volume.external is not None,
        }
        if volume.external is not None:
            lvol["external_snapshot_name"] = volume.external
        if volume.parent is not None:
            lvol["base_snapshot"] = volume.parent
        return {
            "name": volume.uuid,
            "aliases": [alias],
            "product_name": "Logical Volume",
            "block_size": 512,
            "num_blocks": volume.clusters * CLUSTER // 512,
            "uuid": volume.uuid,
            "assigned_rate_limits": self.limits.get(alias, {}),
            "claimed": False,
            "supported_io_types": {"write": not volume.snapshot},
            "driver_specific": {"lvol": lvol},
        }
