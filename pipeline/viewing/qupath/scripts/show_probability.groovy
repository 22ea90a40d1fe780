// Shows the probability of one class of wsi-segment over the open slide, in the color of the class.
//
// In QuPath: open an image, choose Automate > Project scripts > show_probability, click Run and choose a class. The
// opacity slider in the toolbar fades the overlay; the key C turns it off and on. Run the script again to choose another
// class or none. wsi-export overwrites this file, so save a changed script under another name.

import javafx.application.Platform
import javax.imageio.ImageIO
import qupath.fx.dialogs.Dialogs
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.regions.ImageRegion
import static qupath.lib.gui.scripting.QPEx.*

def NONE = '(none)'
def UNFAMILIAR = '(tissue unlike the training data)'
def gui = getQuPath()
def project = getProject()
def viewer = gui == null ? null : getCurrentViewer()
if (viewer == null || viewer.getImageData() == null || project == null)
    throw new IllegalStateException('No image of the project is open. Double-click an image in the list on the left first.')

def folder = project.getPath().toFile().getParentFile()
def id = getProjectEntry()?.getID()
def lines = new File(folder, 'results.tsv').readLines('UTF-8')
def names = lines.head().split('\t', -1)
def row = lines.tail().collect { [names, it.split('\t', -1)].transpose().collectEntries { it } }.find { it.entryID == id }
if (row == null)
    throw new IllegalStateException('This image is not one of the results. Open another image of the project.')

def classes = row.classes.split(',').collect { URLDecoder.decode(it, 'UTF-8') }
def unfamiliar = new File(folder.toURI().resolve("${row.overlays}/unfamiliar.png"))
def choices = classes + (unfamiliar.isFile() ? [UNFAMILIAR] : []) + NONE
def chosen = Dialogs.showChoiceDialog('Probability', 'Class to show over the slide', choices, classes[0])
if (chosen == null)
    return

def overlay = null
if (chosen != NONE) {
    def file = chosen == UNFAMILIAR ? unfamiliar
        : new File(folder.toURI().resolve("${row.overlays}/${classes.indexOf(chosen)}.png"))
    if (!file.isFile())
        throw new FileNotFoundException("${file} is missing. Run 'wsi-export qupath' on the results again.")
    def region = ImageRegion.createInstance(0, 0, row.width as int, row.height as int, 0, 0)
    // Given the viewer, QuPath removes the overlay when the user opens another image.
    overlay = new BufferedImageOverlay(viewer, [(region): ImageIO.read(file)])
}
Platform.runLater {
    def layers = viewer.getCustomOverlayLayers()
    layers.removeIf { it instanceof BufferedImageOverlay }
    if (overlay != null) {
        viewer.getOverlayOptions().setShowPixelClassification(true)
        layers.add(overlay)
    }
    viewer.repaint()
}
println chosen == NONE ? 'No probability is shown.'
    : chosen == UNFAMILIAR ? 'The tissue unlike the training data of the model is shown.' : "The probability of ${chosen} is shown."
