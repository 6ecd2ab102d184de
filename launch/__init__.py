"""What people type: the `longhaul` command and the scripts for `ray submit`."""
