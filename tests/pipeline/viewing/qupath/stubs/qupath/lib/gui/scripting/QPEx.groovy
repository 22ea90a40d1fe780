package qupath.lib.gui.scripting

class QPEx {
    static def project, quPath, currentImageData, currentViewer
    static def getProjectEntry() { project.getEntry(currentImageData) }
}
