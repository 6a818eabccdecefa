"""A network behind HTTP: LitServe runs it, :mod:`.guard` bounds it, a page shows it."""
