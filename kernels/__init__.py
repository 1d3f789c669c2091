"""Low-bit matrix products on raw arrays (imports nothing of quantlab)."""
