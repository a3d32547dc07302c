#!/usr/bin/env bash
# From a fresh machine to a model aligned with PPO: sets up, gets the model and the data, trains a reward model on
# human ratings, runs PPO against it, and says where the results are. Run again, it uses what is there.
#   scripts/quickstart.sh           SmolLM2-135M, about 10 minutes on two cores
#   scripts/quickstart.sh --tiny    a tiny random model, about a minute, no downloads beyond the packages
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "$*" in
"") name=quickstart items=() ;;
--tiny) name=tiny items=(--only tiny) ;;
*)
    echo "usage: scripts/quickstart.sh [--tiny]" >&2
    exit 2
    ;;
esac
# Where this is set, every actor would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE
"$root/scripts/install.sh" "${RLHF_RAY_PROFILE:-cpu}"
# The configs name models/, data/ and runs/ relative to the repository.
cd "$root"
rlhf_ray=${RLHF_RAY_VENV:-$root/.venv}/bin/rlhf-ray

"$rlhf_ray" prepare "${items[@]}"
if [[ -e runs/$name-reward/export ]]; then
    echo "quickstart.sh: using the reward model in runs/$name-reward/export"
else
    "$rlhf_ray" train "configs/${name}_reward.yaml"
fi
"$rlhf_ray" train "configs/$name.yaml"

cat <<END

Results, in $root:
  runs/$name/                rewards and KL as a PNG, metrics.jsonl, samples.jsonl, timeline.json, checkpoints
  runs/$name/export/         the trained model, in Hugging Face format
  runs/$name-reward/export/  the reward model
END
