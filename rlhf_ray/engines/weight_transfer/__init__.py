"""New weights from the policy to the rollout engines, through vLLM's weight-transfer API."""
