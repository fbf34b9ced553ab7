"""The compiler: capture, canonicalize, assign, rewrite, transpose, lower."""
