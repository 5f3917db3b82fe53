"""What a recipe comes to in steps: plan, schedules, open inputs. Free of torch."""
