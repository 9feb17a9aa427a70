"""HTTP around the routes: keys, body limits, middleware, the OpenAPI description."""
