#!/usr/bin/env bash
# Fine-tunes SmolLM2 on the answers that people chose, then trains the result by DPO against those that they rejected.
# Each job starts from the model folder that the one before has written. Run again, it uses what is there.
#   scripts/sft_dpo.sh           SmolLM2-135M on LLaMA-Factory's demo pairs
#   scripts/sft_dpo.sh --tiny    a tiny random model, a minute or two, no downloads beyond the packages
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "$*" in
"") tiny='' data=dpo_demo sft=sft dpo=dpo items=(--only smollm2-135m --only dpo-demo) ;;
--tiny) tiny=tiny- data=tiny_preferences sft=tiny_sft dpo=tiny_preference items=(--only tiny) ;;
*)
    echo "usage: scripts/sft_dpo.sh [--tiny]" >&2
    exit 2
    ;;
esac
# Where this is set, every actor would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE
"$root/scripts/install.sh" "${RLHF_RAY_PROFILE:-cpu}"
# The configs name models/, data/ and runs/ relative to the repository.
cd "$root"
rlhf_ray=${RLHF_RAY_VENV:-$root/.venv}/bin/rlhf-ray
runs=runs/${tiny}sft-dpo

"$rlhf_ray" prepare "${items[@]}"
"$rlhf_ray" train "configs/$sft.yaml" run.dir="$runs/sft" \
    data.train="data/${data}_train.jsonl" data.eval="data/${data}_eval.jsonl" 'data.columns={completion: chosen}' \
    data.max_tokens=512 data.rows_per_step=16
"$rlhf_ray" train "configs/$dpo.yaml" run.dir="$runs/dpo" policy.model="$runs/sft/export"

cat <<END

Results, in $root:
  $runs/sft/export/    the fine-tuned model, which is policy and reference of the next job
  $runs/dpo/export/    the model after DPO
  $runs/*/curves.png   losses, accuracies and log-ratios
END
