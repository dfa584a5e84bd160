"""The demonstration: the whole loop on emulated devices, with the example workflows as the load."""
