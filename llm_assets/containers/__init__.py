"""Container images: build context, packages, the composed stack."""
