"""Parts of the job ``grid``: axes, the cells that they make of a template, choices, and the JSON of results."""
