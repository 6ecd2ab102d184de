"""What trained networks look like inside, and beside one another: `longhaul analyse`."""
