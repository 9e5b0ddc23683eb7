"""The allow-list of architectures. `registry` is free of torch; `build` makes the modules."""
