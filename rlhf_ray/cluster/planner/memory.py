"""Whether a job fits: the processes of all roles on their devices and nodes, phase by phase."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.assignment import assign, requests_of
from rlhf_ray.cluster.planner.footprint import PHASES, Footprint, Item, Phase, Place, always, total
from rlhf_ray.cluster.planner.hardware import Hardware, Machine
from rlhf_ray.cluster.planner.processes import ProcessMemory
from rlhf_ray.cluster.planner.residence import Residence
from rlhf_ray.cluster.planner.rollout_memory import EnginePlan, engine_plan
from rlhf_ray.cluster.planner.scored_memory import scored_items
from rlhf_ray.cluster.planner.trained_memory import trained_items
from rlhf_ray.cluster.planner.workload import Role, RolloutRole, ScoredRole, TrainedRole, Workload
