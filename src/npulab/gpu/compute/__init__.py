"""Networks on OpenCL devices: kernels made for the device at hand, and what runs them."""
