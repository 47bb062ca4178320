"""FOUNDATION: networks of VMs: bridges, firewall tables, DHCP servers and TAPs of this host."""
