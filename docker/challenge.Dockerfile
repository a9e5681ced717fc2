# An image with a model inside, for challenges that take one file. The build context is the model package:
#
#   docker build -f docker/challenge.Dockerfile --target grand-challenge -t team path/to/model
#   docker build -f docker/challenge.Dockerfile --target flare -t team path/to/model
#
# The licence of the model is then one of the image's licences.
ARG IMAGE=medmamba:cpu

# Started without a command; reads /input, writes /output.
FROM ${IMAGE} AS grand-challenge
COPY --chmod=755 . /models/model/
ENTRYPOINT ["/workspace/predict.sh"]
CMD []

# Started with `/bin/bash -c "sh predict.sh"`, with folders at /workspace that belong to whoever runs the challenge.
FROM ${IMAGE} AS flare
COPY --chmod=755 . /models/model/
# hadolint ignore=DL3002
USER 0:0
ENTRYPOINT []
CMD ["sh", "predict.sh"]
