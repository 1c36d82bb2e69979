"""The configuration tree; a package so that `pkg://conf` works from a wheel."""
