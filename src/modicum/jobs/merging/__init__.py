"""What the jobs that merge share with transformers' classes."""
