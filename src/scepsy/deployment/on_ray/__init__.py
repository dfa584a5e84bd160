"""A plan on a Ray cluster: an actor per replica where the plan has it, and one with the endpoint on the head node."""

from scepsy.deployment.on_ray.lifecycle import RayDeployment, deploy_on_ray, find_on_ray

__all__ = ["RayDeployment", "deploy_on_ray", "find_on_ray"]
