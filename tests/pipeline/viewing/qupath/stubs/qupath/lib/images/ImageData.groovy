package qupath.lib.images

class ImageData {
    enum ImageType { BRIGHTFIELD_H_E, BRIGHTFIELD_OTHER, UNSET }
    ImageType imageType = ImageType.UNSET
}
