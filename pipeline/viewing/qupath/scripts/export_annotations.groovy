// Exports the annotations of every image of this project as GeoJSON, for wsi-label import.
//
// In QuPath: choose Automate > Project scripts > export_annotations, then Run. The script writes annotations/SLIDE.geojson
// beside the project for each image with annotations. It works in any project: Automate > Script editor. Then run
//
//     wsi-label import annotations --slide SLIDES -o labels
//
// Without a window: QuPath script scripts/export_annotations.groovy -p project.qpproj

import static qupath.lib.gui.scripting.QPEx.*

def project = getProject()
if (project == null)
    throw new IllegalStateException('No project is open. Open the project with your annotations first (File > Project).')
def folder = new File(project.getPath().toFile().getParentFile(), 'annotations')
folder.mkdirs()
def gui = getQuPath()
def current = getCurrentImageData()
def isOpen = { imageData -> gui != null && gui.getAllViewers().any { it.getImageData().is(imageData) } }
// Run without a window: QuPath runs the script once per image.
def entries = current != null && !isOpen(current) ? [getProjectEntry()] : project.getImageList()

int failed = 0
def written = [] as Set
entries.each { entry ->
    def name = slideName(entry)
    try {
        def viewer = gui?.getAllViewers()?.find {
            it.getImageData() != null && project.getEntry(it.getImageData())?.getID() == entry.getID()
        }
        // Changes of an open image may not be saved yet.
        def hierarchy = viewer == null ? entry.readHierarchy() : viewer.getImageData().getHierarchy()
        def annotations = hierarchy.getAnnotationObjects()
        if (annotations.isEmpty()) {
            println "${name}: no annotations"
            return
        }
        if (!written.add(name.toLowerCase()))
            throw new IllegalStateException('another slide of the project has the same name; rename one')
        exportObjectsToGeoJson(annotations, new File(folder, "${name}.geojson").toString(), 'FEATURE_COLLECTION')
        println "${name}: ${annotations.size()} annotations exported"
    } catch (Exception e) {
        // One failed image does not stop the export of the others.
        failed++
        println "${name}: NOT exported: ${e.getMessage()}"
    }
}
println failed == 0 ? "Done: ${folder}" : "Done, but ${failed} images were not exported; the lines above give the reasons."

/** Return the name of the slide's file, or the name of the image if the slide is not a file. */
String slideName(entry) {
    def uri = entry.getURIs().find { it.getScheme() == 'file' }
    return uri == null ? entry.getImageName().replaceAll('[\\\\/:*?"<>|]', '_') : new File(uri.getPath()).getName()
}
