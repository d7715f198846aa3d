"""The part of the stand-in for W&B's server that takes artifacts: created, their files and manifest sent, committed."""

import json
from typing import Any

ENTITY = "laboratory"


class Artifacts:
    """What was given as artifacts, in the order in which it came; a file of one is at /artifacts/ID/NAME."""

    url: str

    def __init__(self) -> None:
        self.artifacts: list[dict[str, Any]] = []
        """The inputs of their creation."""
        self.used: list[dict[str, Any]] = []
        self.committed: list[str] = []
        self.artifact_files: dict[str, dict[str, bytes]] = {}
        self._known: dict[tuple[str, str], str] = {}

    def id_of(self, collection: str) -> str:
        """The id of the newest version of a collection."""
        return [self._identity(one) for one in self.artifacts if one["artifactCollectionName"] == collection][-1]

    def contents(self, collection: str) -> dict[str, bytes]:
        """The files of its newest version."""
        found = self.artifact_files.get(self.id_of(collection), {})
        return {name: body for name, body in found.items() if name != "manifest"}

    def manifest(self, collection: str) -> dict[str, dict[str, Any]]:
        """What its newest version holds, by path; it is committed, so that its manifest is whole."""
        artifact = self.id_of(collection)
        assert artifact in self.committed
        return json.loads(self.artifact_files[artifact]["manifest"])["contents"]

    def _identity(self, given: dict[str, Any]) -> str:
        key = given["artifactCollectionName"], given["digest"]
        return self._known.setdefault(key, str(len(self._known) + 1))

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _FetchArtifactDigestAlgorithm(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifactType": None}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input", variables)
        self.artifacts.append(given)
        artifact = self._identity(given)
        state = "COMMITTED" if artifact in self.committed else "PENDING"
        sequence = {"id": "1", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": artifact, "state": state, "artifactSequence": sequence}}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._place(variables["artifactID"])}}

    def _UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._place(variables["artifactManifestID"])}}

    def _place(self, artifact: str) -> dict[str, Any]:
        return {"id": artifact, "file": self._file(artifact, "manifest")}

    def _file(self, artifact: str, name: str) -> dict[str, Any]:
        upload = {"uploadUrl": f"{self.url}/artifacts/{artifact}/{name}", "uploadHeaders": []}
        names = {"id": "1", "name": name, "displayName": name, "storagePath": name}
        return {**names, **upload, "uploadMultipartUrls": None, "artifact": {"id": artifact}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [self._file(one["artifactID"], one["name"]) for one in variables["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.committed.append(variables["artifactID"])
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "1"}}}

    def _ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = next(one for one in self.artifacts if self._identity(one) == variables["id"])
        project = {"id": "1", "internalId": "1", "name": "caduceus", "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": given["artifactCollectionName"], "project": project}
        told = {"__typename": "Artifact", "id": variables["id"], "artifactSequence": collection, "versionIndex": 0}
        told |= {"artifactType": {"name": given["artifactTypeName"]}, "description": None, "metadata": None, "tags": []}
        told |= {"ttlDurationSeconds": 0, "ttlIsInherited": True, "historyStep": None, "state": "COMMITTED", "size": 1}
        told |= {"digest": given["digest"], "digestAlgorithm": None, "commitHash": None, "fileCount": 1}
        told |= {"createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": []}
        return {"artifact": told}

    def _UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.used.append(variables.get("input", variables))
        return {"useArtifact": {"artifact": {"id": "1"}}}
