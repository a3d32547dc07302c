"""A PPO run without models: real controller, actors and data, and sleeps in place of the work."""
