"""LXT, Captum and zennit beside fxlrp: each in a process of its own, on the same weights; README.md here."""
