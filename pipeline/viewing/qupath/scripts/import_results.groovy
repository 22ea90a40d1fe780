// Imports the regions of wsi-segment (and the tiles, if there are any) into the images of this project.
//
// In QuPath: Automate > Project scripts > import_results, then Run. It works on every image of the project; what was
// imported before is replaced. Images that are open are changed on the screen, the others are saved.
// Without a window: QuPath script scripts/import_results.groovy -p project.qpproj -s
//
// A region that you unlock is yours: it stays as it is. wsi-export writes this file anew; save a changed one under
// another name.

import groovy.transform.Field
import qupath.lib.io.PathIO
import qupath.lib.io.UriUpdater
import static qupath.lib.gui.scripting.QPEx.*

// Sorting more objects than this into a hierarchy takes minutes, and regions do not lie in each other.
@Field final int RESOLVE_UP_TO = 20000

def project = getProject()
if (project == null)
    throw new IllegalStateException('No project is open: open project.qpproj of the results first (File > Project).')
def folder = project.getPath().toFile().getParentFile()
def rows = readRows(folder)
def gui = getQuPath()
def current = getCurrentImageData()
def isOpen = { imageData -> gui != null && gui.getAllViewers().any { it.getImageData().is(imageData) } }

if (current != null && !isOpen(current)) {
    // QuPath runs the script for one image after the other, and saves each itself.
    def row = rows[getProjectEntry().getID()]
    if (row == null)
        println "${getProjectEntry().getImageName()}: not among the results, left as it is"
    else
        println "${row.name}: ${importInto(current, row)}"
    return
}

int failed = 0
project.getImageList().each { entry ->
    def row = rows[entry.getID()]
    if (row == null)
        return
    try {
        def viewer = gui?.getAllViewers()?.find {
            it.getImageData() != null && project.getEntry(it.getImageData())?.getID() == entry.getID()
        }
        if (viewer != null) {
            println "${row.name}: ${importInto(viewer.getImageData(), row)}"
        } else {
            findSlide(entry, project)
            def imageData = entry.readImageData()
            println "${row.name}: ${importInto(imageData, row)}"
            entry.saveImageData(imageData)
            imageData.getServer().close()
        }
    } catch (Exception e) {
        // The other slides go on.
        failed++
        println "${row.name}: NOT imported: ${e.getMessage()}"
    }
}
project.syncChanges()
// Regions in their colors, and not just their outlines; Shift+F switches it.
gui?.getOverlayOptions()?.setFillAnnotations(true)
println failed == 0 ? 'Done.' : "Done, but ${failed} of ${rows.size()} slides were not imported; see above."

/** What results.tsv says of each image, by its id. */
Map readRows(File folder) {
    def table = new File(folder, 'results.tsv')
    if (!table.isFile())
        throw new IllegalStateException("${table} is missing: run 'wsi-export qupath' on the results again.")
    def lines = table.readLines('UTF-8')
    def names = lines.head().split('\t', -1)
    return lines.tail().collectEntries { line ->
        def cells = [names, line.split('\t', -1)].transpose().collectEntries { it }
        def file = { text -> text.isEmpty() ? null : new File(folder.toURI().resolve(text)) }
        [cells.entryID, [name: URLDecoder.decode(cells.name, 'UTF-8'),
                         files: [file(cells.geojson), file(cells.tiles)].findAll { it != null }]]
    }
}

/** Replace what was imported before; returns what to say of it. */
String importInto(imageData, row) {
    def missing = row.files.find { !it.isFile() }
    if (missing != null)
        throw new FileNotFoundException("${missing} is missing; keep the project folder beside the results")
    def found = row.files.collectMany { PathIO.readObjects(it.toPath()) }
    def ids = found.collect { it.getID() } as Set
    def hierarchy = imageData.getHierarchy()
    def objects = hierarchy.getAllObjects(false)
    def theirs = objects.findAll { it.isAnnotation() && !it.isLocked() && ids.contains(it.getID()) }
    def theirIds = theirs.collect { it.getID() } as Set
    def former = objects.findAll { !theirIds.contains(it.getID()) && (ids.contains(it.getID()) || isOurs(it)) }
    def fresh = found.findAll { !theirIds.contains(it.getID()) }
    fresh.findAll { it.isAnnotation() }.each { it.setLocked(true) }
    hierarchy.removeObjects(former, true)
    hierarchy.addObjects(fresh)
    if (fresh.size() <= RESOLVE_UP_TO)
        hierarchy.resolveHierarchy()
    def kept = theirs.isEmpty() ? '' : ", ${theirs.size()} that you unlocked kept"
    return "${fresh.size()} objects imported, ${former.size()} of an earlier import replaced${kept}"
}

/** Whether an earlier result brought an object: its regions are locked and say their area, its tiles probabilities. */
boolean isOurs(object) {
    def names = object.getMeasurementList().getNames()
    return object.isAnnotation() ? object.isLocked() && names.contains('Area mm^2')
                                 : object.isTile() && !names.isEmpty() && names.every { it.startsWith('Probability ') }
}

/** Look for a slide that has moved along with the project. */
void findSlide(entry, project) {
    def lost = { entry.getURIs().find { it.getScheme() == 'file' && !new File(it).exists() } }
    if (lost() == null)
        return
    UriUpdater.fixUris(entry, project)
    def uri = lost()
    if (uri != null)
        throw new FileNotFoundException("the slide is not at ${new File(uri)}; put it back, or tell QuPath where it is " +
            'when it opens the project (Update URIs)')
}
