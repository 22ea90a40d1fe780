package qupath.lib.regions

class ImageRegion {
    List<Integer> box
    static ImageRegion createInstance(int x, int y, int width, int height, int z, int t) {
        new ImageRegion(box: [x, y, width, height])
    }
}
