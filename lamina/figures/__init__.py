"""Records of what a plan and a bundle cost."""
