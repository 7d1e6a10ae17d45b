"""What the claims of the README rest on: `make bench`."""
