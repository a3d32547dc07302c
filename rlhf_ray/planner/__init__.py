"""What a job needs and how long it takes, known from config.json and a description of the cluster alone."""
