"""A plan on Kubernetes: its manifests, and what applies them."""
