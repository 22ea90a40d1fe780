// Imports the regions of wsi-segment, the areas beside the tissue, and the tiles if they were exported, into the images of
// this project. The areas beside the tissue (folds, pen, dust and others) are hidden: to see them, select their class in the
// list of classes and choose Show/Hide > Show classes in viewer.
//
// In QuPath: choose Automate > Project scripts > import_results, then Run. The script imports into every image of the
// project and replaces earlier imports. It changes open images without saving them, and saves all others.
// Without a window: QuPath script scripts/import_results.groovy -p project.qpproj -s
//
// Unlock a region to edit it: the script never replaces an unlocked region. wsi-export overwrites this file, so save a
// changed script under another name.

import groovy.transform.Field
import qupath.lib.images.ImageData
import qupath.lib.io.PathIO
import qupath.lib.io.UriUpdater
import static qupath.lib.gui.scripting.QPEx.*

// Resolving the hierarchy of more objects takes minutes and is not needed, because regions do not contain each other.
@Field final int RESOLVE_UP_TO = 20000

def project = getProject()
if (project == null)
    throw new IllegalStateException('No project is open. Open qupath/project.qpproj in the results folder first (File > Project).')
def folder = project.getPath().toFile().getParentFile()
def rows = readRows(folder)
def gui = getQuPath()
def current = getCurrentImageData()
def isOpen = { imageData -> gui != null && gui.getAllViewers().any { it.getImageData().is(imageData) } }

if (current != null && !isOpen(current)) {
    // Run without a window: QuPath runs the script once per image and saves the image itself.
    def row = rows[getProjectEntry().getID()]
    if (row == null)
        println "${getProjectEntry().getImageName()}: not one of the results; not changed"
    else {
        println "${row.name}: ${importInto(current, row)}${row.warning}"
        resolve(current, row)
    }
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
            println "${row.name}: ${importInto(viewer.getImageData(), row)}${row.warning}"
            resolve(viewer.getImageData(), row)
        } else {
            findSlide(entry, project, row)
            def imageData = entry.readImageData()
            println "${row.name}: ${importInto(imageData, row)}${row.warning}"
            entry.saveImageData(imageData)
            // After saving: if QuPath cannot sort the objects, the import is safe.
            if (resolve(imageData, row))
                entry.saveImageData(imageData)
            imageData.getServer().close()
        }
    } catch (Exception e) {
        // One failed slide does not stop the import of the others.
        failed++
        println "${row.name}: NOT imported: ${e.getMessage()}"
    }
}
project.syncChanges()
// Fill the regions with their colors; Shift+F turns the fill off and on.
gui?.getOverlayOptions()?.setFillAnnotations(true)
println failed == 0 ? 'Done.' : "Done, but ${failed} of ${rows.size()} slides were not imported; the lines above give the reasons."

/** Return the row of results.tsv for each image, by the image's id. */
Map readRows(File folder) {
    def table = new File(folder, 'results.tsv')
    if (!table.isFile())
        throw new IllegalStateException("${table} is missing. Run 'wsi-export qupath' on the results again.")
    def lines = table.readLines('UTF-8')
    def names = lines.head().split('\t', -1)
    return lines.tail().collectEntries { line ->
        def cells = [names, line.split('\t', -1)].transpose().collectEntries { it }
        def file = { text -> !text ? null : new File(folder.toURI().resolve(text)) }
        def warning = cells.warning ? "; WARNING: ${URLDecoder.decode(cells.warning, 'UTF-8')}" : ''
        [cells.entryID, [name: URLDecoder.decode(cells.name, 'UTF-8'), warning: warning,
                         slide: cells.slide ? file(cells.slide) : null,
                         leftOut: file(cells.left_out),
                         files: [file(cells.geojson), file(cells.tiles)].findAll { it != null }]]
    }
}

/** Import the objects of a result, replace those of earlier imports, and return a summary. */
String importInto(imageData, row) {
    def missing = (row.files + row.leftOut).find { it != null && !it.isFile() }
    if (missing != null)
        throw new FileNotFoundException("${missing} is missing; keep the project folder in the results folder")
    def leftOut = row.leftOut == null ? [] : PathIO.readObjects(row.leftOut.toPath())
    def found = row.files.collectMany { PathIO.readObjects(it.toPath()) } + leftOut
    def ids = found.collect { it.getID() } as Set
    def hierarchy = imageData.getHierarchy()
    def objects = hierarchy.getAllObjects(false)
    def theirs = objects.findAll { it.isAnnotation() && !it.isLocked() && ids.contains(it.getID()) }
    def theirIds = theirs.collect { it.getID() } as Set
    def former = objects.findAll { !theirIds.contains(it.getID()) && (ids.contains(it.getID()) || isOurs(it)) }
    def fresh = found.findAll { !theirIds.contains(it.getID()) }
    // Numbered by class in the order of the file, so the same region has the same name after every import.
    def numbers = [:].withDefault { 0 }
    found.findAll { it.isAnnotation() }.each {
        def className = it.getPathClass()?.toString() ?: 'Region'
        def number = ++numbers[className]
        if (!theirIds.contains(it.getID()))
            it.setName("${className} ${number}".toString())
    }
    fresh.findAll { it.isAnnotation() }.each { it.setLocked(true) }
    hierarchy.removeObjects(former, true)
    hierarchy.addObjects(fresh)
    leftOut.collect { it.getPathClass() }.toSet().each { getQuPath()?.getOverlayOptions()?.setPathClassHidden(it, true) }
    // A type that the user has set stays.
    if (imageData.getImageType() in [null, ImageData.ImageType.UNSET])
        imageData.setImageType(ImageData.ImageType.BRIGHTFIELD_H_E)
    def kept = theirs.isEmpty() ? '' : ", ${theirs.size()} unlocked by you kept"
    return "${fresh.size()} objects imported, ${former.size()} from an earlier import replaced${kept}"
}

/** Sort the objects by what contains what, unless there are too many; return whether that was done. */
boolean resolve(imageData, row) {
    def hierarchy = imageData.getHierarchy()
    if (hierarchy.getAllObjects(false).size() > RESOLVE_UP_TO)
        return false
    try {
        hierarchy.resolveHierarchy()
        return true
    } catch (Exception e) {
        println "${row.name}: the objects are imported, but QuPath could not sort them: ${e.getMessage()}"
        return false
    }
}

/** Return whether an earlier import made this object: a locked region with an area, or a tile with probabilities. */
boolean isOurs(object) {
    def names = object.getMeasurementList().getNames()
    return object.isAnnotation() ? object.isLocked() && names.contains('Area mm^2')
                                 : object.isTile() && !names.isEmpty() && names.every { it.startsWith('Probability ') }
}

/** Find a slide that was moved together with the project. Throws FileNotFoundException if it is not found. */
void findSlide(entry, project, row) {
    def lost = { entry.getURIs().find { it.getScheme() == 'file' && !new File(it).exists() } }
    if (lost() == null)
        return
    // The table has the slide's path from the project's folder. QuPath itself looks relative to the former project.
    if (row.slide?.isFile())
        entry.updateURIs([(lost()): row.slide.toURI()])
    if (lost() != null)
        UriUpdater.fixUris(entry, project)
    def uri = lost()
    if (uri != null)
        throw new FileNotFoundException("the slide is not at ${new File(uri)}; move it back, or enter its new location " +
            'when QuPath opens the project (Update URIs)')
}
