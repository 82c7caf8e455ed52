"""An enterprise's site: follows its provider's orders, and tells how it goes."""
