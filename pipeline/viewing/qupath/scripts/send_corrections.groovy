// Sends what you changed about the regions of wsi-segment back, for wsi-label import --corrections.
//
// Import the regions with import_results. Then change the class of a region, split it, unlock and redraw it, or draw new
// annotations. In QuPath, choose Automate > Project scripts > send_corrections, then Run. The script writes the annotations
// of each image to SLIDE.corrections.geojson beside the slide's result, which stays as it is. Then run
//
//     wsi-label import --corrections RESULTS -o labels
//
// This compares the annotations with the result and imports only what you changed.
// Without a window: QuPath script scripts/send_corrections.groovy -p project.qpproj

import java.nio.file.Files
import java.nio.file.StandardCopyOption
import static qupath.lib.gui.scripting.QPEx.*

def project = getProject()
if (project == null)
    throw new IllegalStateException('No project is open. Open qupath/project.qpproj in the results folder first (File > Project).')
def folder = project.getPath().toFile().getParentFile()
def results = resultFolders(folder)
def gui = getQuPath()
def current = getCurrentImageData()
def isOpen = { imageData -> gui != null && gui.getAllViewers().any { it.getImageData().is(imageData) } }
// Run without a window: QuPath runs the script once per image.
def entries = current != null && !isOpen(current) ? [getProjectEntry()] : project.getImageList()

int failed = 0
entries.each { entry ->
    def name = entry.getImageName()
    def result = results[entry.getID()]
    if (result == null) {
        println "${name}: not one of the results; not sent"
        return
    }
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
        // Beside the result. Written under another name first, so that no reader sees a part of the file.
        def file = new File(result.getParentFile(), "${result.getName()}.corrections.geojson")
        def part = new File(result.getParentFile(), ".${result.getName()}.corrections.part.geojson")
        exportObjectsToGeoJson(annotations, part.toString(), 'FEATURE_COLLECTION')
        Files.move(part.toPath(), file.toPath(), StandardCopyOption.REPLACE_EXISTING)
        println "${name}: ${annotations.size()} annotations sent"
    } catch (Exception e) {
        // One failed image does not stop the others.
        failed++
        println "${name}: NOT sent: ${e.getMessage()}"
    }
}
println failed == 0 ? "Done. Import the changes: wsi-label import --corrections \"${folder.getParentFile()}\" -o labels"
    : "Done, but ${failed} images were not sent; the lines above give the reasons."

/** Return the folder of each image's result, by the image's id. */
Map resultFolders(File folder) {
    def table = new File(folder, 'results.tsv')
    if (!table.isFile())
        throw new IllegalStateException("${table} is missing. Run 'wsi-export qupath' on the results again.")
    def lines = table.readLines('UTF-8')
    def names = lines.head().split('\t', -1)
    return lines.tail().collectEntries { line ->
        def cells = [names, line.split('\t', -1)].transpose().collectEntries { it }
        [cells.entryID, new File(folder.toURI().resolve(cells.geojson)).getCanonicalFile().getParentFile()]
    }
}
