package qupath.lib.gui.scripting

class QPEx {
    static def project, quPath, currentImageData, currentViewer
    static def getProjectEntry() { project.getEntry(currentImageData) }
    static void exportObjectsToGeoJson(Collection objects, String path, String... options) {
        assert options == ['FEATURE_COLLECTION'] as String[]
        def features = objects.collect { o ->
            def properties = [objectType: o.type]
            if (o.className != null)
                properties.classification = [name: o.className]
            if (o.locked)
                properties.isLocked = true
            if (o.measurementList?.names)
                properties.measurements = o.measurementList.names.collectEntries { [it, 1] }
            [type: 'Feature', id: o.id.toString(), properties: properties, geometry: o.geometry]
        }
        new File(path).setText(groovy.json.JsonOutput.toJson([type: 'FeatureCollection', features: features]), 'UTF-8')
    }
}
