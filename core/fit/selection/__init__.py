"""Selection of the ridge by cross-validation and of the kernel's size by an information criterion."""
