"""Jobs over the assets, and what starts them by itself: automation conditions, sensors, schedules."""
