"""On the enterprise's side: the site process, and what it keeps on its disk."""
