"""Rows of the role table that several jobs have, and what they check of them."""

from rlhf_ray.config.placement import JobPlacement, PPOPlacement, RolePlacement
from rlhf_ray.config.roles import Level, ModelSource, RoleKind, RoleSpec
from rlhf_ray.config.training import Critic, Reference, ScoringEngine, TrainedModel


def trained_role(
    kind: RoleKind,
    name: str,
    section: TrainedModel | Critic,
    model: ModelSource,
    placement: RolePlacement,
    ranks: int,
    *,
    passes: int = 0,
    exported: bool = True,
) -> RoleSpec:
    """A model that learns. `name` is that of the role, of its section and in `placement`."""
    needs = {"score": Level.WEIGHTS, "update": Level.FULL, "checkpoint": Level.FULL}
    return RoleSpec(
        name=name,
        kind=kind,
        section=name,
        model=model,
        engine=section.engine,
        placed_as=name,
        placement=placement,
        ranks=ranks,
        needs=needs | ({"export": Level.WEIGHTS} if exported else {}),
        lora=section.lora,
        trained=True,
        checkpointed=True,
        exported=exported,
        score_passes=passes,
    )


def own_model(name: str, section: TrainedModel) -> ModelSource:
    """What `model` of a section names."""
    return ModelSource(f"{name}.model", section.model, section.trust_remote_code)


def reference_role(
    reference: Reference,
    policy: ModelSource,
    placement: RolePlacement,
    ranks: int,
    *,
    passes: int,
    updated: bool = False,
) -> RoleSpec:
    """The model that the policy is held close to or compared with, in so many passes over a step; `updated` where it
    follows the policy."""
    own = reference.from_model != "policy"
    return RoleSpec(
        name="reference",
        kind="causal",
        section="reference",
        model=ModelSource("reference.from", reference.from_model, policy.trust_remote_code) if own else policy,
        engine=reference.engine,
        placed_as="reference",
        placement=placement,
        ranks=ranks,
        needs={"score": Level.WEIGHTS, "checkpoint": Level.WEIGHTS},
        checkpointed=updated,
        score_passes=passes,
    )


def check_unused_reference(reference: Reference, placement: RolePlacement) -> None:
    """With LoRA the policy is the reference too, which then has no engine and no bundles of its own."""
    unused = {
        "reference.engine": reference.engine != ScoringEngine(),
        "placement.reference": placement != PPOPlacement().reference,
    }
    for path in (path for path, is_set in unused.items() if is_set):
        raise ValueError(
            f"{path} has no effect beside policy.lora: the policy with its adapters off is the reference. Leave it "
            "out, or name a model folder in reference.from"
        )


def check_lora(role: RoleSpec, placement: JobPlacement) -> None:
    """Refuse a quantised base model where it can't be held."""
    if role.lora is None or role.lora.base == "as_model":
        return
    base, name = f"{role.section}.lora.base is {role.lora.base!r}", role.section
    if role.model_engine is not None and role.model_engine.zero_stage == 3:
        raise ValueError(f"{base}, which ZeRO can't shard, but {name}.engine.zero_stage is 3")
    if not placement.gpus_of(role.placed_as):
        raise ValueError(f"{base}, which needs a GPU, but placement.{role.placed_as}.gpus is 0")
