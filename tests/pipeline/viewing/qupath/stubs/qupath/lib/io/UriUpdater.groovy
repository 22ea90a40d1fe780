package qupath.lib.io

class UriUpdater {
    /** What QuPath does first: the same way from the project's former place, seen from where it is now. */
    static int fixUris(entry, project) {
        def before = new File(project.previousURI).parentFile.toPath()
        def now = project.file.absoluteFile.parentFile.toPath()
        entry.uris = entry.uris.collect {
            def moved = now.resolve(before.relativize(new File(it).toPath())).normalize()
            !new File(it).exists() && moved.toFile().exists() ? moved.toUri() : it
        }
        return 1
    }
}
