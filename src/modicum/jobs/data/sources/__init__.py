"""Sources of rows, one file each: where ``data.path`` may point.

A source is a function ``(section, name, *, seed, …) -> Rows or list of rows``. ``data.path: KEY:NAME`` asks the source
registered as ``KEY`` for ``NAME``; a path without a key is a file or folder of this machine (``file``), or else an id
of the Hub (``hub``). Keyword-only parameters are what ``data.config`` may set.

* Raw rows are plain dictionaries under the source's own field names. The caller shuffles them, takes the first
  ``size`` and reads them as one of the kinds of rows (:mod:`modicum.jobs.data.kinds`).
* A source that makes its rows, draws its own ``size`` or can score answers returns
  :class:`~modicum.evaluate.rows.Rows`, which are taken as they are.
"""
