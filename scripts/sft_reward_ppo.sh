#!/usr/bin/env bash
# Fine-tunes SmolLM2 on IMDB reviews, trains a reward model on human ratings from the result, and runs PPO on the one
# against the other. Each job starts from the model folders that those before have written. Run again, it uses what is
# there.
#   scripts/sft_reward_ppo.sh           SmolLM2-135M
#   scripts/sft_reward_ppo.sh --tiny    a tiny random model, a few minutes, no downloads beyond the packages
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "$*" in
"") tiny='' sft=sft reward=quickstart_reward ppo=quickstart items=() ;;
--tiny) tiny=tiny- sft=tiny_sft reward=tiny_reward ppo=tiny items=(--only tiny) ;;
*)
    echo "usage: scripts/sft_reward_ppo.sh [--tiny]" >&2
    exit 2
    ;;
esac
# Where this is set, every actor would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE
"$root/scripts/install.sh" "${RLHF_RAY_PROFILE:-cpu}"
# The configs name models/, data/ and runs/ relative to the repository.
cd "$root"
rlhf_ray=${RLHF_RAY_VENV:-$root/.venv}/bin/rlhf-ray
runs=runs/${tiny}sft-reward-ppo

"$rlhf_ray" prepare "${items[@]}"
"$rlhf_ray" train "configs/$sft.yaml" run.dir="$runs/sft"
"$rlhf_ray" train "configs/$reward.yaml" run.dir="$runs/reward" reward.model="$runs/sft/export"
"$rlhf_ray" train "configs/$ppo.yaml" run.dir="$runs/ppo" policy.model="$runs/sft/export" \
    reward.0.model="$runs/reward/export"

cat <<END

Results, in $root:
  $runs/sft/export/      the fine-tuned model: policy and reference of PPO, and what the reward model starts from
  $runs/reward/export/   the reward model, from which the critic starts too
  $runs/ppo/export/      the model after PPO; before_after.md beside it shows responses
END
