// Performs the steps of a user. Each line of the input is [PROJECT, STEP...] in JSON. Each line of the output is what the
// scripts printed and the state of the project after the steps, in JSON.

import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import qupath.fx.dialogs.Dialogs
import qupath.lib.gui.scripting.QPEx
import world.*

System.in.eachLine('UTF-8') { line ->
    def steps = new JsonSlurper().parseText(line)
    def project = Project.load(new File(steps.head()))
    def said = new StringWriter()
    Viewer viewer = null
    QPEx.project = project
    QPEx.quPath = QPEx.currentViewer = QPEx.currentImageData = Dialogs.answer = Dialogs.asked = null

    def run = { name ->
        def shell = new GroovyShell(this.class.classLoader, new Binding(out: new PrintWriter(said, true)))
        try {
            shell.evaluate(new File(project.file.parentFile, "scripts/${name}.groovy"))
        } catch (Exception e) {
            said << "${e.class.simpleName}: ${e.message}\n"
        }
    }
    def objects = { entry ->
        def data = viewer != null && project.open[viewer.imageData].is(entry) ? viewer.imageData : entry.saved
        data.hierarchy.objects
    }
    def annotation = { locked, className, measurements ->
        new PathObject(id: UUID.randomUUID(), type: 'annotation', locked: locked, className: className,
            measurementList: new Measurements(names: measurements))
    }

    steps.tail().each { step ->
        def (verb, what) = (step.split('=', 2) as List) + ''
        switch (verb) {
            case 'open':
                def entry = project.entries.find { it.imageName == what }
                viewer = new Viewer(imageData: entry.readImageData())
                project.open[viewer.imageData] = entry
                QPEx.quPath = new Gui(viewers: [viewer])
                QPEx.currentViewer = viewer
                QPEx.currentImageData = viewer.imageData
                break
            case 'headless':
                project.entries.each { entry ->
                    def data = entry.readImageData()
                    project.open[data] = entry
                    QPEx.currentImageData = data
                    run(what ?: 'import_results')
                    entry.saveImageData(data)
                }
                QPEx.currentImageData = null
                break
            case 'no-project':
                QPEx.project = null
                break
            case 'run':
                run(what)
                break
            case 'choose':
                Dialogs.answer = what
                break
            case 'stale':
                project.entries.each { objects(it).add(annotation(true, 'class-0', ['Area mm^2'])) }
                break
            case 'unsortable':
                project.entries.each { objects(it).add(annotation(false, 'unsortable', [])) }
                break
            case 'forget':
                project.previousURI = null
                break
            case 'fluorescence':
                project.entries.each { it.saved.imageType = qupath.lib.images.ImageData.ImageType.BRIGHTFIELD_OTHER }
                break
            case 'draw':
                project.entries.each { objects(it).add(annotation(false, 'mine', [])) }
                break
            case 'reclassify':
                project.entries.each { objects(it)[0].className = what }
                break
            case 'unlock':
                project.entries.each {
                    def first = objects(it)[0]
                    first.locked = false
                    first.className = 'edited'
                }
                break
            default:
                throw new IllegalArgumentException(step)
        }
    }

    def byName = { what -> project.entries.collectEntries { [it.imageName, what(it)] } }
    def answer = JsonOutput.toJson([
        said: said.toString(),
        saves: byName { it.saves },
        synced: project.synced,
        types: byName { it.saved.imageType.toString() },
        uris: byName { it.uris*.toString() },
        resolved: byName { it.saved.hierarchy.resolved },
        objects: byName { objects(it).collect {
            [id: it.id.toString(), type: it.type, locked: it.locked, class: it.className, name: it.name]
        } },
        asked: Dialogs.asked,
        shown: viewer?.overlayOptions?.showPixelClassification,
        hidden: QPEx.quPath?.overlayOptions?.hiddenClasses,
        filled: QPEx.quPath?.overlayOptions?.fillAnnotations,
        overlays: viewer?.customOverlayLayers?.collect { it.regions.collect { region, img ->
            [box: region.box, size: [img.width, img.height], pixel: img.getRGB(img.width.intdiv(4), img.height.intdiv(2))]
        } },
    ])
    println answer
}
