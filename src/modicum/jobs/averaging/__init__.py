"""What the job ``average`` is made of: the loss of a mean of models, and what is measured beside the choice."""
