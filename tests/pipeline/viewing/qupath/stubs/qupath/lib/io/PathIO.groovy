package qupath.lib.io

import groovy.json.JsonSlurper
import world.Measurements
import world.PathObject

class PathIO {
    static List<PathObject> readObjects(java.nio.file.Path path) {
        new JsonSlurper().parse(path.toFile(), 'UTF-8').features.collect { feature ->
            def properties = feature.properties
            new PathObject(
                id: UUID.fromString(feature.id), type: properties.objectType, locked: properties.isLocked ?: false,
                className: properties.classification?.name, geometry: feature.geometry,
                measurementList: new Measurements(names: properties.measurements.keySet() as List))
        }
    }
}
