"""Items made by a thread, a few ahead of whoever needs them."""
