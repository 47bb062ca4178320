"""SET-UP: disk images that VMs begin with: imported, downloaded or built, then never changed."""
