"""The course's own code: small modules, each readable in one sitting. Start with `helpers.profiles`."""
