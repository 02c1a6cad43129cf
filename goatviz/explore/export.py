"""One offline page of an explorer, for the values that are in it."""
def write_page(explorer, path, vary):
    raise RuntimeError("being written")
