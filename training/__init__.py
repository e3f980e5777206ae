"""What trains: a step, recipes, the stages, and the session around them."""
