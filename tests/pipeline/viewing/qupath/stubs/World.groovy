// Stubs of the QuPath classes and methods that the project's scripts use.

package world

import groovy.json.JsonSlurper

class Measurements {
    List<String> names
    List<String> getNames() { names }
}

class PathObject {
    UUID id
    String type, className, name
    String getPathClass() { className }
    boolean locked
    Map geometry = [type: 'Polygon', coordinates: [[[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]]]
    Measurements measurementList
    UUID getID() { id }
    boolean isAnnotation() { type == 'annotation' }
    boolean isTile() { type == 'tile' }
}

class Hierarchy {
    List<PathObject> objects = []
    int resolved = 0
    Collection<PathObject> getAllObjects(boolean includeRoot) { objects }
    Collection<PathObject> getAnnotationObjects() { objects.findAll { it.isAnnotation() } }
    void removeObjects(Collection<PathObject> gone, boolean keepChildren) {
        assert keepChildren
        objects = objects.findAll { o -> !gone.any { it.is(o) } }
    }
    void addObjects(Collection<PathObject> more) { objects = objects + more }
    void resolveHierarchy() {
        if (objects.any { it.className == 'unsortable' })
            throw new IllegalStateException('side location conflict')
        resolved++
    }
}

class Server {
    void close() {}
}

class ImageData extends qupath.lib.images.ImageData {
    Hierarchy hierarchy = new Hierarchy()
    Server server = new Server()
}

class Entry {
    long entryID
    String imageName
    List<URI> uris
    ImageData saved = new ImageData()
    int saves = 0
    String getID() { entryID as String }
    List<URI> getURIs() { uris }
    ImageData readImageData() {
        def data = new ImageData()
        data.hierarchy.objects = new ArrayList(saved.hierarchy.objects)
        data.imageType = saved.imageType
        data
    }
    Hierarchy readHierarchy() { saved.hierarchy }
    void saveImageData(ImageData data) { saved = data; saves++ }
    boolean updateURIs(Map<URI, URI> places) { uris = uris.collect { places.getOrDefault(it, it) }; true }
}

class Project {
    File file
    URI previousURI
    List<Entry> entries
    Map<ImageData, Entry> open = new IdentityHashMap()
    int synced = 0

    static Project load(File file) {
        def json = new JsonSlurper().parse(file, 'UTF-8')
        new Project(file: file, previousURI: new URI(json.uri), entries: json.images.collect {
            assert it.serverBuilder.builderType == 'uri'
            new Entry(entryID: it.entryID, imageName: it.imageName, uris: [new URI(it.serverBuilder.uri)])
        })
    }
    java.nio.file.Path getPath() { file.toPath() }
    List<Entry> getImageList() { entries }
    Entry getEntry(ImageData data) { open[data] }
    void syncChanges() { synced++ }
}

class OverlayOptions {
    boolean showPixelClassification = false
    boolean fillAnnotations = false
    Set<String> hiddenClasses = []
    void setPathClassHidden(String className, boolean hidden) { hidden ? hiddenClasses.add(className) : hiddenClasses.remove(className) }
}

class Viewer {
    ImageData imageData
    OverlayOptions overlayOptions = new OverlayOptions()
    List customOverlayLayers = []
    int repaints = 0
    void repaint() { repaints++ }
}

class Gui {
    List<Viewer> viewers = []
    OverlayOptions overlayOptions = new OverlayOptions()
    List<Viewer> getAllViewers() { viewers }
}
